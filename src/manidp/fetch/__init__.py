"""What comes from the network: downloads under one policy, and archives read within limits."""
