"""Tests of lvxattn."""
