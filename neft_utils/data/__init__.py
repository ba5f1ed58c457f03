"""Where rows come from, what is left out, and how they are split."""
