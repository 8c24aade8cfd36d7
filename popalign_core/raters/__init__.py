"""What people say of images: blinded studies and audits, designed here, answered on a page, read back and checked."""
