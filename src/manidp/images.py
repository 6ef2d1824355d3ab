"""Where pictures were read before version 0.2; what to write now is said to whoever imports this."""

raise ImportError("manidp.images is now manidp.data.images: write 'from manidp.data.images import load_sample'")
