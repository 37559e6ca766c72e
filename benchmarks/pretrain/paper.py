"""Table 2 of the GaLore paper (arXiv 2403.03507v2): C4 validation perplexity and memory in GB, by method and size of the model."""

from __future__ import annotations

SIZES = ("60M", "130M", "350M", "1B")
Column = tuple[float, float]  # perplexity, GB

# The names are those of the contest. 8-bit GaLore is in the paper's table 3 only (7B), and a frozen control nowhere.
TABLE_2: dict[str, tuple[Column, Column, Column, Column]] = {
    "adamw": ((34.06, 0.36), (25.08, 0.76), (18.80, 2.06), (15.56, 7.80)),
    "galore_adamw": ((34.88, 0.24), (25.36, 0.52), (18.95, 1.22), (15.64, 4.38)),
    "low_rank": ((78.18, 0.26), (45.51, 0.54), (37.41, 1.08), (142.53, 3.57)),
    "lora": ((34.99, 0.36), (33.92, 0.80), (25.58, 1.76), (19.21, 6.17)),
    "relora": ((37.04, 0.36), (29.37, 0.80), (29.08, 1.76), (18.33, 6.17)),
}

CONVENTIONS = """\
Below, the paper's table 2: perplexity on C4's validation text, in brackets over that of full rank, then memory in GB. Its conventions:

- Memory is an estimate, not a measurement: weights and optimizer state at 2 bytes (bf16) an element, without gradients and activations.
  Above, both are bytes of the storages that a run held: weights, moments and bases in fp32, but 8-bit moments and a bf16 basis for
  8-bit GaLore's matrices. Embeddings, head and norms keep AdamW's fp32 moments in every row above.
- Perplexity is exp of a mean of batches' mean losses (divided by one more than their number, as the published code does), over more
  than 10 million tokens of documents cut or padded to 256 T5 tokens. Above, it is exp of the mean over all tokens of packed windows,
  in another vocabulary: ratios compare, perplexities do not.
- Tokens: 1.1B (60M), 2.2B (130M), 6.4B (350M), 13.1B (1B) in batches of 131,072; gap 200, scale 0.25, ranks 128, 256, 256, 512.
  Learning rates are tuned for each method over {0.01, 0.005, 0.001, 0.0005, 0.0001}; warm-up over a tenth, then cosine to a tenth.
"""
