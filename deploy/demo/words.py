"""The vocabulary of the generated tasks."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STEMS = _words(
    """amber apple arrow autumn badge baker basket beacon berry bird blanket blossom boat book bottle branch bread
    breeze bridge bright brook brush bucket butter button cabin candle canyon castle cedar chair cherry cloud clover
    coast copper corn cotton cradle creek crow crystal dawn deer desert diamond dragon dream drift drum eagle earth
    ember fabric falcon feather fern field finger fire fish flame flint flower forest fox frost garden gate ghost
    ginger glass goat gold grain grape grass gravel green hammer harbor hazel heart hill honey horse house ice
    island ivory jewel king kitchen ladder lake lantern leaf lemon light lily linen lion maple market meadow melon
    milk mill mirror mist moon moss mountain needle night north oak ocean olive orange orchard otter owl paper pearl
    pepper pine planet plum pocket pond prairie queen quilt rabbit rain raven reed ribbon river road robin rock rose
    rust saddle sail salmon salt sand scarf sea shadow shell shore silk silver sky smoke snow song south spark
    sparrow spice spider spring star stone storm straw stream sugar summer sun sunset table thistle thunder tiger
    timber tower train tree tulip tunnel valley velvet village violet wagon walnut water wave west whale wheat
    willow wind window wing winter wolf wood yarn yellow"""
)

NAMES = _words(
    """Ada Amir Anna Bruno Carla Chen Clara Dario Diego Elena Emma Farid Felix Fiona Grace Hana Hugo Ines Ivan Jonas
    Julia Kofi Lara Leo Lina Lucas Maya Mira Nadia Nico Nora Omar Oscar Paula Pedro Rosa Ruth Samir Sara Simon Sofia
    Tara Theo Tomas Vera Victor Yara Yuki Zoe Zara"""
)

SURNAMES = _words(
    """Adams Baker Becker Castro Costa Dubois Evans Fischer Garcia Hansen Ito Jensen Keller Lopez Martin Moreau Novak
    Okafor Patel Petrov Quinn Rossi Santos Silva Tanaka Turner Vogel Weber Young Ziegler"""
)

CITIES = _words(
    """Accra Athens Berlin Bogota Boston Cairo Chicago Dakar Delhi Dublin Geneva Hanoi Helsinki Istanbul Kyoto Lagos
    Lima Lisbon London Madrid Milan Montreal Mumbai Nairobi Naples Oslo Paris Prague Quito Riga Rome Seattle Seoul
    Sydney Tokyo Toronto Tunis Vienna Warsaw Zurich"""
)

JOBS = _words(
    """architect baker carpenter chemist dentist designer doctor driver engineer farmer gardener journalist lawyer
    librarian mechanic musician nurse painter photographer pilot plumber potter sailor surgeon tailor teacher
    translator waiter welder writer"""
)

MONTHS = _words("January February March April May June July August September October November December")

ONES = _words(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen"""
)

TENS = _words("- ten twenty thirty forty fifty sixty seventy eighty ninety")
