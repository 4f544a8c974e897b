"""What the Makefile and the tests run on the repository itself."""
