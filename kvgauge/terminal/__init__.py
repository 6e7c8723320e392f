"""What a terminal shows, and files that programs write."""
