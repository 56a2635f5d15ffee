"""The labelling app: raters compare images and texts in a browser, and no vote is lost."""
