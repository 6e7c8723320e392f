"""Terminal output, and files that programs write."""
