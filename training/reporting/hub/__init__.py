"""Published weights on the Hugging Face Hub: what a repository holds, and how it gets there whole."""
