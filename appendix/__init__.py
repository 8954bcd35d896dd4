"""What the chapters stand on or are measured by, one concept per file. See README.md here."""
