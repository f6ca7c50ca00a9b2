"""What all floors' tests share: tiny bases, adapters made by PEFT, and PEFT itself as the oracle."""
