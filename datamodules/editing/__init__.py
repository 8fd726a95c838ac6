"""Editing prompts: instructions with source images."""
