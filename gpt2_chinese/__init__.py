"""What more than one script of the pipeline shares."""
