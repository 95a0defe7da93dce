"""What is written and shown beside a run."""
