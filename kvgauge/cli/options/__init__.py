"""Groups of command-line options, and what they make of recipes, policies and scoring."""
