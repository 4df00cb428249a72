//! A snapshot of the database that a reader has seen, so that its next read returns exactly what became visible since.

/// The transactions that a read has seen: PostgreSQL's snapshot as text, `<xmin>:<xmax>:<those in between that were in
/// progress>`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, sqlx::Type)]
#[sqlx(transparent)]
pub struct SeenSnapshot(String);

impl SeenSnapshot {
    /// The longest text accepted from a client: room for some hundred transactions in progress.
    const BYTES_MAX: usize = 4096;

    /// Parses the text that a client received in an event's id; `None` if it is not a snapshot.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (xmin, xmax): (i64, i64) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let between = Some(parts.next()?).filter(|between| !between.is_empty());
        let between = between.into_iter().flat_map(|between| between.split(','));
        let between: Vec<i64> = between.map(|xid| xid.parse().ok()).collect::<Option<_>>()?;
        let rising = between.windows(2).all(|pair| pair[0] < pair[1]);
        let within = between.iter().all(|xid| (xmin..xmax).contains(xid));
        let whole = parts.next().is_none() && text.len() <= Self::BYTES_MAX && 0 < xmin && xmin <= xmax;
        (whole && rising && within).then(|| Self(text.to_owned()))
    }

    /// Whether this snapshot is not later than `now`. A later one belongs to another database, and says nothing about
    /// this one.
    #[must_use]
    pub fn is_before(&self, now: &Self) -> bool {
        let xmax = |snapshot: &Self| snapshot.0.split(':').nth(1).and_then(|xid| xid.parse::<i64>().ok());
        xmax(self) <= xmax(now)
    }
}

impl std::fmt::Display for SeenSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_postgresql_writes_is_a_snapshot() {
        for good in ["10:10:", "10:20:", "10:20:10,14,19"] {
            assert_eq!(SeenSnapshot::parse(good).unwrap().to_string(), good);
        }
        let long = format!("10:9999999999:{}", (100..2000).map(|xid| xid.to_string()).collect::<Vec<_>>().join(","));
        for bad in [
            "",
            "x",
            "10",
            "10:20",
            "20:10:",
            "0:10:",
            "-5:10:",
            "10:20:14,11",
            "10:20:20",
            "10:20:9",
            "10:20:11:12",
            "10:20:,14",
            "10:20:14,,15",
            &long,
        ] {
            assert_eq!(SeenSnapshot::parse(bad), None, "{bad}");
        }
    }
}
