"""The hub of model cards: find, bring, verify and publish models."""
