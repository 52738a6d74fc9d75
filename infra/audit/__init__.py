"""The auditor's tools: copying a log, verifying it offline, reporting. No torch, no coordinator."""
