"""Paged memory of one worker: KV pages and adapter pages, and who holds them."""
