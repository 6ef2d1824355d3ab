"""Pictures and data sets, and the models, images and cards that come with the package."""
