"""Small worlds of pictures and captions whose truth is known, for training, checking and trying things out."""
