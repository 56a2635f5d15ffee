"""Synthetic datasets: what a specification asks for, made, judged, kept or rejected, measured, and handed out."""
