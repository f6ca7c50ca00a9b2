"""Tests of the whole service on a real Ray: marked `ray`, and sharing one deployment where they leave it as it was."""
