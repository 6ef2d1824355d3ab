"""What was computed for whom: a network's findings over labelled images, and their drawing as one HTML page."""
