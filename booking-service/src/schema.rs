//! The database schema: `migrations/`, compiled in.

use sqlx::migrate::Migrator;

/// All migrations, in the order of their numbers.
pub static MIGRATIONS: Migrator = sqlx::migrate!();
