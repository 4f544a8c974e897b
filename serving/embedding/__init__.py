"""Text embeddings: requests, responses, the encoder."""
