"""Measurements that several papers' claims share."""
