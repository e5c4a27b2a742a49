"""What servers say and what it means: plain functions of plain values. No I/O, no asyncio, no aiosmtplib."""
