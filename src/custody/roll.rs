//! Things that are found by the number of a descriptor: the one name that a client has in the ledger, in
//! the poll, and everywhere in the program.

use std::os::fd::RawFd;

use slab::Slab;

/// No place.
const NOWHERE: u32 = u32::MAX;

/// Things by descriptor number. Numbers are small and used again by the kernel, so they lead to places
/// without a hash; the things themselves lie close together, because half of all descriptors are
/// files.
#[derive(Debug)]
pub struct Roll<T> {
    places: Vec<u32>,
    things: Slab<T>,
}

impl<T> Default for Roll<T> {
    fn default() -> Self {
        Roll {
            places: Vec::new(),
            things: Slab::new(),
        }
    }
}

impl<T> Roll<T> {
    /// Room for so many things.
    pub fn reserve(&mut self, count: usize) {
        self.things.reserve(count);
    }

    fn place(&self, number: RawFd) -> Option<usize> {
        let place = *self.places.get(usize::try_from(number).ok()?)?;
        (place != NOWHERE).then_some(place as usize)
    }

    /// What has this number.
    pub fn get(&self, number: RawFd) -> Option<&T> {
        self.things.get(self.place(number)?)
    }

    /// What has this number, to change it.
    pub fn get_mut(&mut self, number: RawFd) -> Option<&mut T> {
        let place = self.place(number)?;
        self.things.get_mut(place)
    }

    /// Whether something has this number.
    pub fn contains(&self, number: RawFd) -> bool {
        self.place(number).is_some()
    }

    /// Enters something. It comes back if the number is taken, or is none of an open descriptor.
    pub fn insert(&mut self, number: RawFd, thing: T) -> Result<(), T> {
        let Ok(at) = usize::try_from(number) else {
            return Err(thing);
        };
        if self.place(number).is_some() || at >= MOST {
            return Err(thing);
        }
        if self.places.len() <= at {
            self.places.resize(at.saturating_add(1), NOWHERE);
        }
        let place = self.things.insert(thing);
        self.set_place(at, place);
        Ok(())
    }

    fn set_place(&mut self, at: usize, place: usize) {
        if let Some(known) = self.places.get_mut(at) {
            // There are fewer things than descriptors, and fewer of those than the word holds.
            *known = u32::try_from(place).unwrap_or(NOWHERE);
        }
    }

    /// Takes something out.
    pub fn remove(&mut self, number: RawFd) -> Option<T> {
        let place = self.place(number)?;
        let at = usize::try_from(number).ok()?;
        if let Some(known) = self.places.get_mut(at) {
            *known = NOWHERE;
        }
        self.things.try_remove(place)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.things.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.things.is_empty()
    }

    /// Up to which number there may be things.
    pub fn end(&self) -> usize {
        self.places.len()
    }

    /// The numbers, in their order.
    pub fn numbers(&self) -> impl Iterator<Item = RawFd> + Clone {
        let taken = self.places.iter().enumerate();
        taken
            .filter(|(_, place)| **place != NOWHERE)
            .filter_map(|(number, _)| RawFd::try_from(number).ok())
    }

    /// All of them, in the order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (RawFd, &T)> + Clone {
        self.numbers()
            .filter_map(|number| Some((number, self.get(number)?)))
    }

    /// Makes something else of each; the first failure ends it.
    pub fn try_map<U, E>(
        mut self,
        mut make: impl FnMut(RawFd, T) -> Result<U, E>,
    ) -> Result<Roll<U>, E> {
        let mut made = Roll::default();
        made.reserve(self.len());
        let numbers: Vec<RawFd> = self.numbers().collect();
        for number in numbers {
            if let Some(thing) = self.remove(number) {
                let thing = make(number, thing)?;
                // The number was free to be one in the first roll: it is here, too.
                let _ = made.insert(number, thing);
            }
        }
        Ok(made)
    }
}

/// No kernel gives a process more descriptors than this (`fs.nr_open` has at most 2^31 - 64 in theory,
/// 2^20 by default). A damaged ledger must not make us ask for memory for its numbers.
const MOST: usize = 1 << 24;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_leads_to_one_thing_until_that_is_taken_out() {
        let mut roll = Roll::default();
        assert_eq!(roll.insert(7, 'a'), Ok(()));
        assert_eq!(roll.insert(7, 'b'), Err('b'));
        assert_eq!(roll.insert(-1, 'b'), Err('b'));
        assert_eq!(roll.insert(i32::MAX, 'b'), Err('b'));
        assert_eq!(roll.insert(3, 'c'), Ok(()));
        assert_eq!(
            (roll.get(7), roll.get(3), roll.get(4)),
            (Some(&'a'), Some(&'c'), None)
        );
        assert_eq!(roll.remove(7), Some('a'));
        assert_eq!(roll.remove(7), None);
        let numbers = roll.try_map(|number, _| Ok::<_, ()>(number)).unwrap();
        assert_eq!((numbers.get(3), numbers.len()), (Some(&3), 1));
    }
}
