"""Terminal output, and the files, tables and plots that programs write."""
