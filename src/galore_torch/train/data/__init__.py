"""What is read: documents, tokens, batches in a fixed order."""
