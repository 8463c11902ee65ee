"""Prompt to Mask: five language-guided medical segmentation papers in one small library."""
