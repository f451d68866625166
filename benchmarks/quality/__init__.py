"""The quality bench: contestants, studies, runs, a ledger, a report."""
