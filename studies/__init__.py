"""Which runs stand in which table: trains what is missing, evaluates, and sets the paper's numbers beside ours."""
