"""Any number of images through one engine: from folders, tar shards and Parquet into Parquet."""
