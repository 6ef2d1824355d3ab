"""Gates: where they go (``place``), how ManiDP makes one (``manidp``), and its static twin (``static``)."""
