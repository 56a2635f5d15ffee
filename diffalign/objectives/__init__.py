"""One pure function per formula: tensors in, per-sample loss and metrics out."""
