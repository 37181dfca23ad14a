"""Step 3: the committed global parameters as a Hugging Face model."""
