"""Parts of a stage over tiles that stay in cache, in memory of their own, or without any copy."""
