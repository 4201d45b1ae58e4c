"""Which experts a model needs: statistics, allocation, evaluation and the report."""
