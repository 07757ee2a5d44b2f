"""Floor 3: `fastsd compare` - several runs side by side in one page."""
