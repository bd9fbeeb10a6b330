"""The Redis door for ETL programs: read files, cut blocks, submit, follow progress."""
