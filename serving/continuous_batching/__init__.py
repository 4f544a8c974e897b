"""Token generation for sequences that join and leave a batch at every decode step."""
