"""What is aligned: policies over diffusers and transformers models."""
