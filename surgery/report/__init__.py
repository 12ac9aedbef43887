"""What was done, or would be, or is there: rows first, then a table for people, JSON for programs, or a picture."""
