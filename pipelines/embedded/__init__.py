"""The image models that ship with diffalign, and the scripts that train them (``make embedded``)."""
