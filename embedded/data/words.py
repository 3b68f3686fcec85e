"""Everyday words, from which all texts are made. Order matters: a seed picks by position, so append, never insert."""

from collections.abc import Sequence


def _words(text: str) -> Sequence[str]:
    words = tuple(text.split())
    assert len(set(words)) == len(words), sorted({word for word in words if words.count(word) > 1})
    return words


def _phrases(text: str) -> Sequence[str]:
    return tuple(phrase.strip() for phrase in text.split(",") if phrase.strip())


NOUNS = _words("""
    falcon river garden window table lamp bridge forest mountain valley island harbor castle tower market village
    street station train ticket wagon engine wheel road path field meadow farm barn fence gate door key lock box
    basket bottle glass cup plate spoon fork knife kettle oven stove pan pot bread butter cheese apple pear plum
    cherry grape lemon orange banana peach melon berry nut seed root leaf branch tree oak pine birch maple willow
    cedar flower rose lily tulip daisy violet grass moss fern mushroom stone rock pebble sand dust mud clay brick
    wall roof floor ceiling stairs cellar attic kitchen bedroom hall room house cabin tent hut palace temple church
    school library museum theater cinema studio gallery office factory mill mine shop bakery cafe hotel inn bank
    hospital clinic pharmacy prison court parliament embassy airport runway pilot plane rocket satellite planet moon
    star sun comet galaxy cloud rain snow storm thunder lightning wind breeze fog frost ice hail rainbow shadow
    light flame fire smoke ash spark candle torch lantern mirror picture painting statue drawing poster photo
    camera film screen radio phone letter envelope stamp postcard parcel package newspaper magazine book page
    chapter story poem song melody rhythm drum flute violin piano guitar trumpet bell whistle organ harp choir
    orchestra concert stage curtain costume mask crown throne sword shield arrow bow spear helmet armor flag banner
    ship boat canoe ferry anchor sail mast rope net hook fish whale shark dolphin seal otter beaver crab lobster
    oyster shell coral wave tide beach coast cliff cave lake pond stream waterfall spring well fountain canal dam
    bird eagle hawk owl crow raven sparrow robin swan duck goose hen rooster turkey parrot pigeon penguin ostrich
    lion tiger leopard panther wolf fox bear deer moose elk rabbit hare squirrel hedgehog mole mouse rat bat badger
    horse pony donkey mule camel cow bull calf goat sheep lamb pig dog puppy cat kitten monkey gorilla elephant
    giraffe zebra hippo rhino kangaroo koala panda snake lizard turtle frog toad spider ant bee wasp beetle
    butterfly moth dragonfly cricket worm snail doctor nurse teacher student lawyer judge farmer baker butcher
    cook waiter driver sailor captain soldier guard king queen prince knight wizard artist writer poet singer
    dancer actor painter sculptor builder carpenter plumber miner hunter fisher tailor jeweler clerk manager
    engineer scientist chemist explorer traveler tourist guest neighbor friend uncle aunt cousin brother sister
    father mother daughter son child baby team club crew band army police crowd family class lesson exam grade
    pencil pen paper notebook ruler chalk board desk chair bench sofa couch pillow blanket carpet rug shelf
    drawer cabinet closet hanger coat jacket shirt sweater scarf glove hat cap boot shoe sock belt button zipper
    pocket purse wallet coin bill ring necklace bracelet watch clock calendar map compass globe telescope
    microscope thermometer scale hammer nail screw saw drill ladder bucket shovel rake broom brush sponge soap
    towel comb needle thread cotton wool silk leather iron copper silver gold bronze steel tin lead coal oil gas
    salt sugar pepper honey milk tea coffee juice soup salad rice pasta pizza cake cookie candy chocolate cream
    egg bacon sausage steak onion garlic carrot potato tomato cucumber pumpkin bean pea corn wheat barley hay
    gear pump valve pipe cable battery sensor switch magnet motor tractor truck van taxi bus bicycle
    tram subway tunnel crossing corner square park playground stadium ball racket goal trophy medal race
    puzzle riddle game toy doll kite balloon puppet present gift party wedding birthday holiday journey voyage
    answer question secret promise dream idea plan project report meeting speech debate contract permit receipt
    invoice budget price discount order delivery record signal message code number label symbol
""")  # fmt: skip

ADJECTIVES = _words("""
    amber crimson scarlet golden silent hidden ancient modern gentle bitter sweet sour salty spicy bright dark pale
    heavy light quick slow swift rapid lazy busy calm stormy windy sunny cloudy rainy snowy frozen icy cold cool
    warm hot dry wet damp dusty muddy sandy rocky smooth rough sharp blunt soft hard solid hollow empty full open
    closed broken whole narrow wide broad deep shallow high low tall short long tiny small little big large huge
    giant vast round flat curved straight crooked steep square red blue green yellow purple pink brown black white
    gray violet turquoise ivory silver bronze copper rusty shiny glossy dull polished painted wooden metal plastic
    paper woolen silken cotton velvet leather marble crystal new old young fresh stale ripe raw cooked baked roasted
    fried boiled happy sad angry proud shy brave bold timid clever wise foolish honest loyal friendly hostile polite
    rude kind cruel generous greedy humble noble royal common rare famous unknown secret public private local
    foreign northern southern eastern western central upper lower inner outer early late daily weekly monthly annual
    first second third final last next recent future past urgent patient nervous eager tired sleepy awake hungry
    thirsty healthy sick strong weak fragile sturdy safe dangerous wild tame free captive lost found missing spare
    single double triple simple complex plain fancy elegant clumsy neat messy clean dirty pure mixed natural
    artificial real fake true false correct wrong exact certain doubtful possible likely useful useless
    precious cheap costly valuable lucky unlucky magic electric digital mechanical musical poetic legal medical
    coastal alpine polar tropical desert urban rural floral nimble quiet noisy loud distant nearby remote lonely
    crowded jolly merry grim stern mild fierce tender brisk vivid faint dense thin thick slim
""")  # fmt: skip

FIRST_NAMES = _words("""
    Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karla Leon Maria Nils Olga Paul Rosa Simon Tina Victor
    Wanda Xaver Yara Zoe Alice Bruno Carmen Diego Elena Frank Gloria Henry Irene James Karen Louis Martha Nora Oscar
    Peter Quentin Rachel Samuel Theresa Ulrich Vera Walter Ximena Yusuf Zara Amir Bianca Carlos Daria Erik Fatima
    George Hannah Igor Julia Kenji Laura Mateo Nadia Omar Priya Ravi Sofia Tomas Uma Viktor Wei Yuki Aaron Bella
    Caleb Dora Ethan Fiona Gavin Helen Isaac Jenny Kevin Linda Marco Nina Otto Pamela Robert Sarah Thomas Ursula
    Vincent Wendy Adam Beth Colin Diana Edgar Flora Grant Heidi Ivan Joan Kurt Lena Max Naomi Oliver Petra Rita Sven
    Tara Lukas Mia Noah
""")  # fmt: skip

LAST_NAMES = _words("""
    Berger Smith Fischer Weber Brown Miller Taylor Wilson Moreau Rossi Novak Larsen Kowalski Silva Tanaka Singh Chen
    Garcia Martin Keller Hoffmann Wagner Baker Cooper Turner Parker Collins Hughes Foster Graham Hansen Lindgren
    Petrov Sato Kim Nguyen Lopez Costa Ferrari Dubois
""")  # fmt: skip

CITIES = _phrases("""
    Berlin, Paris, London, Madrid, Rome, Vienna, Prague, Warsaw, Lisbon, Dublin, Oslo, Stockholm, Helsinki, Copenhagen,
    Athens, Budapest, Brussels, Amsterdam, Zurich, Geneva, Munich, Hamburg, Cologne, Milan, Venice, Naples, Barcelona,
    Seville, Porto, Lyon, Krakow, Tokyo, Osaka, Kyoto, Seoul, Beijing, Shanghai, Singapore, Bangkok, Hanoi, Jakarta,
    Manila, Delhi, Mumbai, Lahore, Dubai, Cairo, Tunis, Nairobi, Lagos, Accra, Dakar, Cape Town, Sydney, Melbourne,
    Perth, Auckland, Toronto, Montreal, Vancouver, Boston, Chicago, Denver, Dallas, Seattle, Miami, Austin, New York,
    Mexico City, Havana, Bogota, Lima, Quito, Santiago, Buenos Aires, Rio, Brasilia, Reykjavik, Riga, Tallinn
""")

VERBS = _words("""
    find open close start stop send read write list count check move copy build paint repair clean order book cancel
    update create delete search translate convert compare measure record report print export import upload share lock
    unlock reserve rent buy sell pay refund schedule plan remind call invite follow track map rate review sort filter
    merge split archive restore
""")  # fmt: skip
"""Also the first words of tools' names."""

THINGS = _words("""
    table room ticket flight hotel order invoice payment account profile contact message letter meeting event task
    note file folder image photo video song playlist report chart map route address weather forecast recipe meal
    product parcel package price rate offer contract license device sensor lamp door heater camera printer server
    backup log record issue comment review poll survey game score lesson course exam book page chapter article
    library museum tour car bus train bike taxi plant garden field stock loan budget
""")  # fmt: skip
"""What tools work on."""

PLACES = _phrases("""
    near the bridge, in the garden, behind the house, on the table, by the river, at the station, under the old tree,
    in the kitchen, at the market, on the hill, across the street, in the library, by the window, near the harbor,
    in the small village, at the end of the road, beside the mill, on the north side, in the cellar, above the door
""")

TIMES = _phrases("""
    in the morning, at noon, in the evening, after lunch, before sunrise, on Monday, on Friday, last week, this year,
    every day, at midnight, in early spring, during the winter, for two hours, since yesterday, once a month,
    late at night, on the first day, all summer, from time to time
""")

UNITS = _words("meters kilometers grams kilograms liters minutes hours days weeks years euros dollars pages steps")

FOREIGN = (
    "Guten Morgen, wie geht es Ihnen?",
    "Der Zug nach München fährt um acht Uhr ab.",
    "Das Wetter ist heute schön und kühl.",
    "Wir treffen uns später am großen Fluss.",
    "Bonjour, où est la gare ?",
    "Le café est fermé jusqu'à mardi.",
    "Une petite fille a trouvé la clé dorée.",
    "L'été, les élèves dînent près du marché.",
    "今天天气很好。",
    "我在图书馆看书。",
    "请问车站在哪里？",
    "谢谢你的帮助。",
    "The sign says “open” – see you soon 🙂.",
    "Great work, everyone 🎉🚀!",
    "The path costs 5 € (about £4).",
    "Señor Núñez vive en Málaga.",
)
"""A little of what is not ASCII, so that no byte is foreign to the model."""

COMMON = _words("""
    A a about above across after After again all and As as asked at back before behind belongs beside bought bridge
    but by came cannot cellar children code costs day days dollars door during Each early end euros evening every
    Every first for found Friday from garden grams had harbor has hill hours house in In is It it keep key kilograms
    kilometers kitchen knew label Last last late lay letter library likes liters lived long looked lost lunch mark
    market meeting meters midnight mill mind minutes Monday month more morning Most moved near needs never next night
    Nobody noon north Note number of old on once Once other others pages password people played Please reach Remember
    river road said saw say says side since slowly small sold Some spring station stays steps stood stopped street
    summer sunrise table than that The the then There They things this time to token told took tree two under value
    village walked wanted was way We week weeks were When whether window winter with Without works wrote year years
    yesterday you
""")  # fmt: skip
"""What sentences and lists are made with: words so frequent that each is one token."""
