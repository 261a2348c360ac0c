//! The clients of a server that are served, in the order of connecting. The admin program lists them and
//! finds one by its number, and how many there are is what limits them. There are thousands, so nothing
//! is kept of one but its name: the number that orders them is in the client.

use std::collections::VecDeque;

use super::clients::ClientId;

/// Clients in the order of their numbers. They come with ever higher ones; where one goes, the shorter
/// half of a few bytes each is moved.
#[derive(Debug, Default)]
pub struct Served(VecDeque<ClientId>);

impl Served {
    /// These, which are in order.
    pub fn in_order(ids: impl Iterator<Item = ClientId>) -> Served {
        Served(ids.collect())
    }

    /// One more, with this number. `number_of` knows those of the others.
    pub fn insert(
        &mut self,
        id: ClientId,
        number: u64,
        number_of: impl Fn(ClientId) -> Option<u64>,
    ) {
        let is_last = |last: &ClientId| number_of(*last) < Some(number);
        if self.0.back().is_none_or(is_last) {
            self.0.push_back(id);
        } else {
            self.0.insert(self.place(number, number_of), id);
        }
    }

    /// Takes one out, if it is there. Its number is still known.
    pub fn remove(
        &mut self,
        id: ClientId,
        number: u64,
        number_of: impl Fn(ClientId) -> Option<u64>,
    ) {
        let place = self.place(number, number_of);
        if self.0.get(place) == Some(&id) {
            self.0.remove(place);
        }
    }

    /// The one with this number.
    pub fn find(
        &self,
        number: u64,
        number_of: impl Fn(ClientId) -> Option<u64>,
    ) -> Option<ClientId> {
        let found = *self.0.get(self.place(number, &number_of))?;
        (number_of(found) == Some(number)).then_some(found)
    }

    /// Where the first is that has no lower number.
    fn place(&self, number: u64, number_of: impl Fn(ClientId) -> Option<u64>) -> usize {
        self.0
            .partition_point(|known| number_of(*known) < Some(number))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = ClientId> {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_stay_in_the_order_of_their_numbers_whichever_comes_or_goes() {
        // The number of a client is ten times its descriptor here.
        let number_of = |id: ClientId| u64::try_from(id.0).ok().map(|number| number * 10);
        let mut served = Served::default();
        for descriptor in [3, 9, 5, 7, 4] {
            let id = ClientId(descriptor);
            served.insert(id, number_of(id).unwrap(), number_of);
        }
        let now = |served: &Served| served.iter().map(|id| id.0).collect::<Vec<_>>();
        assert_eq!(now(&served), [3, 4, 5, 7, 9]);
        assert_eq!(served.find(70, number_of), Some(ClientId(7)));
        assert_eq!(served.find(71, number_of), None);
        served.remove(ClientId(6), 60, number_of);
        served.remove(ClientId(5), 50, number_of);
        served.remove(ClientId(9), 90, number_of);
        assert_eq!((now(&served).as_slice(), served.len()), (&[3, 4, 7][..], 3));
    }
}
