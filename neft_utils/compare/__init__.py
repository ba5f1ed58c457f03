"""Many runs: statistics, tables, claims, published answers, figures."""
