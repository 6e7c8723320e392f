"""Statistics to an artifact: fits of sites, chains of predicted sites, bit budgets."""
