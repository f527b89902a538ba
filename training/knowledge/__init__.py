"""Entities and relations found in domain text, as a graph that can be queried, checked and used for sampling."""
