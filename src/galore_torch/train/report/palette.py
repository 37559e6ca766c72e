"""The colours of every picture and page, written once. Imports nothing: benchmarks use them too."""

INK = "#1b1f24"
# Colours that stay apart in print and for colour-blind readers (Okabe and Ito, 2008), and the same on a dark page.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
DARK = ("#4aa3df", "#ff8a4c", "#2fc79b", "#e39bc4", "#f2b636", "#8ccff5", "#a8a8a8")
PALE = "#b8b8b8"  # what others have, beside ours in colour
DEPTH = ("#2b7bba", "#a06a9c", "#e0603b")  # first to last layer, on light and dark
