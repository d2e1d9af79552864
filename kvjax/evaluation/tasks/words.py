"""Short common English words, the names of things in tasks and in training texts.

All are distinct, of three to seven lower-case letters. The order is fixed: a task that
takes the first few keeps its examples when words are added at the end.
"""

_LISTED = """
apple river stone cloud tiger piano lemon chair ocean maple horse candle window
bridge garden silver rocket pepper island button mirror basket castle dragon engine
forest guitar hammer jacket ladder magnet needle orange pencil rabbit saddle ticket
valley walnut yellow acorn actor album alley almond amber anchor angle ankle answer
apron arch arena armor arrow artist atlas attic autumn avenue award bacon badge
bagel baker ballet balloon bamboo banana banjo banner barber barn barrel basil basin
beach beacon bead beaver beetle bell belt bench berry bird biscuit bison blanket
blossom board boat bonnet book boot border bottle bottom boulder bowl box boy branch
brass bread breeze brick brook broom brush bubble bucket buffalo build bundle bunny
burger bus butter cabin cable cactus cake camel camera camp canal canary candy
cannon canoe canyon cape captain car carbon card cargo carpet carrot cart cat cattle
cave cedar cellar cello cement center ceramic cereal chain chalk channel chapel
cheese cherry chess chest chicken chief chimney circle circus city clay clerk cliff
clinic clock cloth clover coach coal coast coat cobalt cocoa coconut coffee coin
collar college color column comet compass concert cookie copper coral cork corn
corner cotton couch country cousin cow crab cradle crane crater crayon cream creek
cricket crow crown crystal cube cup curtain cushion custom cycle dairy daisy dance
date dawn deck deer degree delta dentist desert desk dial diamond diary dinner dish
dock doctor dog doll dolphin dome donkey door dove drawer dream dress drill drink
drum duck dune dust eagle ear earth east easel echo editor eel egg elbow elk elm
ember emerald empire entry envoy estate evening event face factory falcon family fan
farm farmer feather fence fern ferry fiddle field fig film finch finger fire fish
flag flame flask fleet flight flour flower flute foam fog fold foot fork fossil fox
frame friend frog frost fruit funnel galaxy gallery gallon game garage garlic gate
gem ghost giant ginger giraffe glacier glass globe glove glue goat gold goose grain
grape graph grass gravel ground guest guide gull habit hall harbor hare harp harvest
hat hawk hay hazel heart heaven hedge helmet herb heron hill hinge hockey hollow
home honey hoof hook horizon horn hotel hour house human hut ice icon igloo inch ink
inn insect iris iron ivory ivy jade jam jar jasmine jeans jelly jewel judge juice
jungle jury kettle key kidney king kitchen kite kitten knee knife knight knot koala
label lace lady lake lamp land lane lantern lark laundry lava lawn lawyer leaf
leather lemur lens leopard letter library light lily lime linen lion lizard llama
lobby lobster lock locust log lotus lumber lunch lynx machine magic mango manor map
marble march margin market marsh mask mason meadow meal medal melon member memory
menu metal meteor milk mill mint minute mist mole monk monkey month moon moose
morning mosaic moss moth motor mouse mud muffin museum music napkin nation nature
neck nephew nest net nickel night north nose note novel number nurse nut oak oar
oasis oat oboe office oil olive onion opera orbit orchard orchid organ otter oven
owl owner oxygen oyster paddle page paint palace palm panda panel panther paper
parade parcel parent park parrot party pasta path patio peach peanut pear pearl
pebble pelican pen penguin penny people perfume person petal phone photo picnic
picture pie pigeon pillow pilot pine pipe pirate pizza planet plant plate plaza plum
pocket poem poet polar police pond pony poplar poppy port poster potato prairie
prince prism prize puddle pumpkin puppet puppy purple puzzle quail quarry quartz
queen quill quilt raccoon radar radio radish raft rail rain ranch raven recipe
record reef region ribbon rice riddle ring road robe robin robot rock roof room
rooster root rope rose ruby rug ruler saffron sail sailor salad salmon salt sand
sandal satin sauce scale scarf school science scooter score screen script sea seal
season seat secret seed senator shadow shark sheep shelf shell shield ship shirt
shoe shop shore shovel shrimp signal silk singer sister skate sketch ski skirt sky
sled slope smoke snail snow soap soccer sock sofa soil soldier song soup south spade
sparrow sphere spice spider spinach spirit sponge spoon spring spruce square squid
stable stage stair stamp star statue steam steel stem step stork storm stove straw
stream street student studio sugar suit summer summit sun sunset surf swan sweater
switch sword symbol syrup system table tailor target taxi tea teacher team temple
tennis tent theater thread throne thumb thunder tide tile timber tire toast toe
tomato tool tooth torch tower town toy tractor trail train tray treaty tree tribe
trophy trout truck trumpet tulip tunnel turkey turnip turtle twig uncle uniform
union urn vacuum van vanilla vase vault velvet verse vessel village vine vinegar
violet violin visitor voice volcano voyage wagon waiter wall walrus water wave wax
weather wedding west whale wheat wheel whistle wicket willow wind wine wing winter
wire wizard wolf wood wool worker world wren wrist writer yacht yard yarn year
yogurt zebra zinc zipper zone
"""

WORDS: tuple[str, ...] = tuple(_LISTED.split())
